"""Tools that know nothing of learning: checks, files, messages, dictionaries of tensors, processes."""
