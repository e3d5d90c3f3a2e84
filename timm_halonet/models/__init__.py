"""The HaloNets: H0 to H7, the hybrids, and U-HaloNet."""
