"""The terms of an outer rule's gradient (Nichol et al. 2018, section 5), measured on a model and its tasks."""
