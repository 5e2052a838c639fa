"""What nodes show: the texts of their sockets, text under a node, plots, labelled sheets."""
