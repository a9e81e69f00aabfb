"""The model: configuration, weights, forward pass, KV cache tensors and sampling."""
