"""Who holds weights: the policy that is trained, and the frozen models beside it."""
