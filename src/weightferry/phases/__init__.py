"""The seven phases of one call, a module each: agree, resolve, survey, plan, transfer, publish, link."""
