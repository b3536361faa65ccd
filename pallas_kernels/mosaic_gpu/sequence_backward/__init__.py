"""The backward of the sequence part: one kernel for dq, with the slots, and one for dk and dv."""
