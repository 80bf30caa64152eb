"""What finished runs say: statistics, comparisons, tuning, and how well targeting finds what decides.

It reads run folders; it trains nothing and draws nothing.
"""
