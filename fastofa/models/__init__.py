"""timm models and their weights."""
