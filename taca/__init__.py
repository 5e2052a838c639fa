"""Temperature-adjusted cross-modal attention: the method, and how ComfyUI's models get it."""
