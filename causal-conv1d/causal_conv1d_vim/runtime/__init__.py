"""What the operators of both kernel packages share: choice of a backend, autograd helpers, and loading of libraries."""
