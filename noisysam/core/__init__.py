"""The ground: what every part of the package may import, and what imports no other part."""
