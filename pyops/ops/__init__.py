"""One page an operator: schema, checks, fake kernel, backends, docstring."""
