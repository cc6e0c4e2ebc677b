"""Which timm models are supported, one file a family, and what the library reads off them."""
