"""The bad inputs by kind, with a few good ones beside them."""

from tests.campaign.inputs import commands, keys, numbers, policies, rewards, runs, yaml_files

CASES = {
    "yaml": yaml_files.CASES,
    "keys": keys.CASES,
    "numbers": numbers.CASES,
    "policies": policies.CASES,
    "runs": runs.CASES,
    "rewards": rewards.CASES,
    "commands": commands.CASES,
}
