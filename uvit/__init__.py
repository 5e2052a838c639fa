"""U-ViT with early or intermediate fusion of text and image; independent of TACA."""
