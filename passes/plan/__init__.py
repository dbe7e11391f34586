"""Plans, what they may say, and the schedule that they unroll to."""
