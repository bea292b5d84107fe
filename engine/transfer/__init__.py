"""The method: word converter, merge, and what is measured about them (VPGTrans, arXiv 2305.01278)."""
