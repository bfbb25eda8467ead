"""The one name by which configurations select the CPU rollout; importing it imports nothing."""

ROLLOUT = "vilavt_hf"
"""``actor_rollout_ref.rollout.name`` of the rollout engine of this package."""
