"""Less to train and less to ship."""
