"""Keeps a shipped model learning: new tasks beside old answers, every version kept, none promoted that is worse."""
