"""Exchange with scikit-learn: an estimator in its style, and conversion of fitted SVMs."""
