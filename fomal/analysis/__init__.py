"""What an outer rule's gradient is made of (Nichol et al. 2018, section 5), measured on a model and its tasks."""
