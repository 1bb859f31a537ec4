"""What people do with the model: classify, describe, ask, index and search images."""
