"""Which weights are the best place to learn? (C9)"""
