"""Does memory do as well as overlapping windows, for how much less compute? (C1)"""
