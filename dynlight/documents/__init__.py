"""From texts to segments: documents, the waves in which they are read, and what cuts them."""
