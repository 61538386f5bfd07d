"""UniHyperLoRA: one small adapter file that attaches to any Transformer."""
