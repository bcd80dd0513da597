"""timm models, their weights, and the kernels that are put into them."""
