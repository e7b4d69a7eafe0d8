"""What people say of a model's answers, before anything is learnt from it."""
