"""Healing: a plan, and what learns in it by gradient. Terms and learners are one file each."""
