"""Can a small adapted model match a larger static one? (C7)"""
