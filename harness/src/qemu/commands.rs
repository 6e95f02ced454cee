//! The monitor commands that the lab uses (QEMU documentation, "QEMU QMP Reference Manual").

use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError};
use crate::wait::{self, Deadline};

fn patience(command: &'static str) -> Deadline {
    Deadline::new(command, wait::QMP_COMMAND)
}

impl Qmp {
    /// Hot-adds a device: an object with at least `driver`, `id` and `bus`.
    pub fn device_add(&self, device: Value, deadline: &Deadline) -> Result<(), QmpError> {
        self.execute("device_add", device, deadline).map(drop)
    }

    /// Unplugs a device and waits until QEMU has let go of it.
    ///
    /// The guest takes part, so this fails when it refuses, and takes until the deadline when it does
    /// not answer.
    pub fn device_del(&self, id: &str, deadline: &Deadline) -> Result<(), QmpError> {
        let mut events = self.events();
        self.execute("device_del", json!({ "id": id }), deadline)?;
        let what = format!("QEMU to let go of {id}");
        let end = events.wait_any(&what, deadline, |event| {
            let names = ["DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"];
            names.contains(&event.name.as_str()) && event.data["device"] == id
        })?;
        if end.name == "DEVICE_DELETED" {
            return Ok(());
        }
        Err(QmpError::Failed {
            what: format!("unplugging {id}"),
            reason: "the guest refuses to give it up".into(),
        })
    }

    /// Stops the guest's CPUs.
    pub fn stop(&self) -> Result<(), QmpError> {
        self.execute("stop", Value::Null, &patience("stop"))
            .map(drop)
    }

    /// Lets them run (again).
    pub fn cont(&self) -> Result<(), QmpError> {
        self.execute("cont", Value::Null, &patience("cont"))
            .map(drop)
    }

    /// The run state: `running`, `paused`, `inmigrate`, ...
    pub fn status(&self) -> Result<String, QmpError> {
        let answer = self.execute("query-status", Value::Null, &patience("query-status"))?;
        match answer.get("status").and_then(Value::as_str) {
            Some(status) => Ok(status.to_owned()),
            None => Err(QmpError::Protocol(format!("query-status answers {answer}"))),
        }
    }

    /// Presses the reset button.
    pub fn system_reset(&self) -> Result<(), QmpError> {
        self.execute("system_reset", Value::Null, &patience("system_reset"))
            .map(drop)
    }

    /// Presses the power button: the guest's init decides what follows.
    pub fn system_powerdown(&self) -> Result<(), QmpError> {
        self.execute(
            "system_powerdown",
            Value::Null,
            &patience("system_powerdown"),
        )
        .map(drop)
    }

    /// Tells QEMU to end. The answer may be lost with the connection, which is no failure.
    pub fn quit(&self) -> Result<(), QmpError> {
        match self.execute("quit", Value::Null, &patience("quit")) {
            Ok(_) | Err(QmpError::Closed { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Turns migration capabilities on.
    pub fn set_migration_capabilities(&self, names: &[&str]) -> Result<(), QmpError> {
        let on = |name: &&str| json!({ "capability": name, "state": true });
        let list: Vec<Value> = names.iter().map(on).collect();
        let command = "migrate-set-capabilities";
        self.execute(command, json!({ "capabilities": list }), &patience(command))
            .map(drop)
    }
}
