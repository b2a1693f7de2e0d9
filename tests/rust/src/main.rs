//! Workers of the published Rust SDK. `sdk-worker control` does what standard input says, one JSON
//! object a line, and reports on standard output, like tests/node/worker.mjs; `sdk-worker presence`
//! is the presence example. The end of the input ends the program.

// The stream triggers' types are marked as deprecated in this line of the SDK.
#![allow(deprecated)]

use std::io::Write;

use iii_helpers::stream::StreamJoinLeaveTriggerConfig;
use iii_sdk::builtin_triggers::IIITrigger;
use iii_sdk::protocol::{RegisterTriggerInput, TriggerAction, TriggerRequest};
use iii_sdk::{Error, IIIClient, InitOptions, RegisterFunction, register_worker_from_env};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

type Failure = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let worker = register_worker_from_env(InitOptions::default());
    match std::env::args().nth(1).as_deref() {
        Some("control") => control(&worker).await?,
        Some("presence") => presence(&worker).await?,
        other => return Err(format!("unknown mode {other:?}").into()),
    }
    worker.shutdown_async().await;
    Ok(())
}

/// Write one report.
fn report(line: Value) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").expect("standard output is open");
    out.flush().expect("standard output is open");
}

async fn control(worker: &IIIClient) -> Result<(), Failure> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        run(worker, serde_json::from_str(&line)?).await?;
    }
    Ok(())
}

async fn run(worker: &IIIClient, command: Value) -> Result<(), Failure> {
    let text = |key: &str| command[key].as_str().unwrap_or_default().to_string();
    match command["do"].as_str() {
        Some("function") => {
            let (id, returns) = (text("id"), command["returns"].clone());
            let called = id.clone();
            worker.register_function(
                id,
                RegisterFunction::new_async(move |data: Value| {
                    report(json!({"called": called, "data": data}));
                    let returns = returns.clone();
                    async move { Ok::<Value, Error>(returns) }
                }),
            );
        }
        Some("trigger") => {
            let config = command["config"].clone();
            let input = RegisterTriggerInput::new(text("type"), text("function_id"), config);
            worker.register_trigger(input)?;
        }
        Some("call") => {
            // In a task of its own, so that calls overlap as they do in an application.
            let (worker, tag) = (worker.clone(), command["tag"].clone());
            let request = TriggerRequest::new(text("function_id"), command["payload"].clone());
            tokio::spawn(async move {
                report(match worker.trigger(request).await {
                    Ok(result) => json!({"answer": tag, "result": result}),
                    Err(Error::Remote { code, message, .. }) => {
                        json!({"answer": tag, "error": format!("{code}: {message}")})
                    }
                    Err(error) => json!({"answer": tag, "error": error.to_string()}),
                });
            });
        }
        Some("void") => {
            let mut request = TriggerRequest::new(text("function_id"), command["payload"].clone());
            request.action = Some(TriggerAction::Void);
            worker.trigger(request).await?;
        }
        other => return Err(format!("unknown command {other:?}").into()),
    }
    Ok(())
}

/// Who joins a group of the stream "chat" is an item of the same group of the stream "presence"
/// until the subscription ends.
async fn presence(worker: &IIIClient) -> Result<(), Failure> {
    let joiner = worker.clone();
    worker.register_function(
        "presence::join",
        RegisterFunction::new_async(move |join: Value| {
            let worker = joiner.clone();
            async move {
                if join["stream_name"] == "chat" {
                    let item = json!({
                        "stream_name": "presence",
                        "group_id": join["group_id"],
                        "item_id": join["subscription_id"],
                        "data": {"id": join["subscription_id"], "status": "online"},
                    });
                    worker
                        .trigger(TriggerRequest::new("stream::set", item))
                        .await?;
                }
                Ok::<Value, Error>(json!({"unauthorized": false}))
            }
        }),
    );
    let leaver = worker.clone();
    worker.register_function(
        "presence::leave",
        RegisterFunction::new_async(move |leave: Value| {
            let worker = leaver.clone();
            async move {
                if leave["stream_name"] == "chat" {
                    let item = json!({
                        "stream_name": "presence",
                        "group_id": leave["group_id"],
                        "item_id": leave["subscription_id"],
                    });
                    worker
                        .trigger(TriggerRequest::new("stream::delete", item))
                        .await?;
                }
                Ok::<Value, Error>(Value::Null)
            }
        }),
    );
    let config = StreamJoinLeaveTriggerConfig::new();
    let join = IIITrigger::StreamJoin(config.clone()).for_function("presence::join");
    let leave = IIITrigger::StreamLeave(config).for_function("presence::leave");
    worker.register_trigger(join)?;
    worker.register_trigger(leave)?;

    // Registrations are not answered; what is sent after them is.
    worker
        .trigger(TriggerRequest::new("stream::list_all", json!({})))
        .await?;
    report(json!({"ready": true}));

    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while lines.next_line().await?.is_some() {}
    Ok(())
}
