"""From prompts to scored forests: what is asked for (task), groups of an iteration rolled out (rolling) and scored (judging), the
whole iteration (collect), all processes together (gather). Knows policies and rewards, but no objective and no optimizer.
"""
