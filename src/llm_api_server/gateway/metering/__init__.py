"""What a request is recorded as, admitted by and charged for in a worker."""
