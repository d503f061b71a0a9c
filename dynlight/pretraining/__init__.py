"""How a base model is made: pretrained on text files, or fine-tuned."""
