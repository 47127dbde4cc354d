"""Model families: their names, parts and sizes."""
