"""Instruments: tuning, inspection, timing, verification. None of them runs inside a user's call."""
