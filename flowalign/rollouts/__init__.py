"""From prompts to scored forests: what is asked for (task), one iteration of it (collect), all processes together
(gather). Knows policies and rewards, but no objective and no optimizer.
"""
