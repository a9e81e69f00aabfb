"""Starting a real tritonserver on a generated model repository. Standard library only."""
