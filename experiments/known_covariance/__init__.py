"""The synthetic experiments of the SUPN paper, section 5.1: does a network recover covariances that are known?"""
