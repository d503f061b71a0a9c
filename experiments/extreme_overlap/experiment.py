"""At 48 new tokens in a window of 1,024, is memory's loss the same, and how much cheaper is it? (C1)"""
