"""What this machine has, what trtdeploy can therefore do on it, and what does not fit together.

``examination`` looks, ``judgement`` decides from what was seen, ``plan_needs`` compares a plan with it.
"""
