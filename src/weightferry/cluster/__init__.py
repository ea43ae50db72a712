"""Who is in the job, who shares storage, and how ranks run a phase together."""
