"""U-ViT with early or intermediate fusion of text and image, of its own beside TACA."""
