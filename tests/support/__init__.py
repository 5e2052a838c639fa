"""What the tests stand on: tiny models, references, stand-ins, servers and the page."""
