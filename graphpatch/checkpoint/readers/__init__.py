"""Who else reads adapters, and what each of them refuses or misreads. All that only looks needs no torch."""
