//! The process that `start` leaves behind, one for each sandbox: it serves containerd's Task services until the
//! last task is gone.
