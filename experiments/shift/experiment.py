"""Under a shift, does a short adapted context beat a long static one, and where does that end? (C5, C6)"""
