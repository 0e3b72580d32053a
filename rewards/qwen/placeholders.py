"""Stand-ins for the texts that are not shipped: they let `rewards.listing` describe these rewards, and score nothing of use
(noncanonical_template is 1)."""

INSTRUCTION = "{text_prompt}"
INSTRUCTION_EDIT_FOLLOWING = "{text_prompt}"
INSTRUCTION_EDIT_QUALITY = "{text_prompt}"
prompt_with_special_token = "<|Reward|>"
DETAILED_PROMPT_WITH_SPECIAL_TOKEN = "{text_prompt} <|VQ_reward|> <|MQ_reward|> <|TA_reward|>"
