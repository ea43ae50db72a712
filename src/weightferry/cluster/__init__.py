"""Who is in the job, who shares storage, and how ranks learn of each other's outcomes."""
