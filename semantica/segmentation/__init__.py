"""Open-vocabulary segmentation by cost aggregation: CAT-Seg (Cho et al., arXiv 2303.11797)."""
