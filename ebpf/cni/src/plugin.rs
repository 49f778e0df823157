//! The plugin: one call of a container runtime, from its environment and standard input to an answer on standard output.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use tidegate_ebpf::{Error as KernelError, attach_fixed, detach_fixed, fixed_devices, is_attached};

use crate::files::{self, Standing, Touch};
use crate::link::{self, Host};
use crate::spec::{Attachment, Call, CniError, Command, MAX_INPUT, code, versions};
use crate::wire::{Answer, Ask, Attached, Request, VERSION};

/// How long the agent may take for a new pod. It answers sooner by itself; one that hangs must not hang the node.
const ANSWER: Duration = Duration::from_secs(10);
/// And for one that goes.
const GOODBYE: Duration = Duration::from_secs(1);

/// Answers one call.
pub fn main() -> ExitCode {
    let mut input = Vec::new();
    // One more than is taken, so that more is noticed.
    let read = io::stdin().lock().take(MAX_INPUT as u64 + 1).read_to_end(&mut input);
    let answer = read
        .map_err(|e| CniError::new(code::IO, "stdin", e))
        .and_then(|_| Call::read(|name| std::env::var(name).ok(), &input))
        .and_then(|call| run(&call).map_err(|e| CniError { version: call.version, ..e }));
    let (text, exit) = match answer {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(error) => (serde_json::to_string(&error).unwrap_or_default(), ExitCode::FAILURE),
    };
    // The runtime is gone when this fails.
    let said = io::stdout().lock().write_all(text.as_bytes());
    if said.is_ok() { exit } else { ExitCode::FAILURE }
}

/// Carries a call out; gives what goes to standard output.
///
/// # Errors
/// What the runtime is told.
pub fn run(call: &Call) -> Result<String, CniError> {
    match (call.command, &call.attachment) {
        (Command::Version, _) => Ok(versions(&call.version)),
        // Pods can always be added: without an agent the plugin does what is safe by itself.
        (Command::Status, _) => Ok(String::new()),
        (Command::Add, Some(of)) => add(call, of),
        (Command::Check, Some(of)) => check(call, of),
        (Command::Del, Some(of)) => {
            // It is called again and again until it succeeds, and nothing that is left here is in anybody's way.
            let _ = files::forget(&call.paths.folder, of);
            let _ = ask(&call.paths.folder, Ask::Del(of.clone()), GOODBYE);
            sweep(&call.paths.pins);
            Ok(String::new())
        }
        (Command::Gc, _) => {
            for gone in files::all_noted(&call.paths.folder).into_iter().filter(|a| !call.left.contains(&a.attachment))
            {
                let _ = files::forget(&call.paths.folder, &gone.attachment);
            }
            let _ = ask(&call.paths.folder, Ask::Gc(call.left.clone()), GOODBYE);
            sweep(&call.paths.pins);
            Ok(String::new())
        }
        (_, None) => Err(CniError::new(code::ENVIRONMENT, "CNI_CONTAINERID", "it is not set")),
    }
}

fn host(call: &Call, of: &Attachment) -> Result<Option<Host>, CniError> {
    let Some(netns) = &call.netns else { return Ok(None) };
    link::host_side(netns, &of.ifname)
        .map_err(|e| CniError::new(code::IO, format!("device {} in {}", of.ifname, netns.display()), e))
}

fn add(call: &Call, of: &Attachment) -> Result<String, CniError> {
    let (Some(pod), Some(result)) = (&call.pod, &call.result) else {
        return Err(CniError::new(code::CONFIG, "prevResult", "it is missing"));
    };
    let Some(host) = host(call, of)? else {
        // Whatever an agent knows beside this: no program of its own could be there either.
        let standing = Standing::read(&call.paths.standing).unwrap_or_default();
        if standing.touch(&pod.namespace) != Touch::Isolated {
            return Ok(result.clone());
        }
        let text =
            format!("it is no veth, and pods of namespace {} are not let out by any other device", pod.namespace);
        return Err(CniError::new(code::DEVICE, format!("device {}", of.ifname), text));
    };
    let attached =
        Attached { attachment: of.clone(), pod: pod.clone(), addresses: call.addresses.clone(), ifindex: host.ifindex };
    // Before the agent is asked: one that starts at this moment reads it after it has begun to listen.
    files::note(&call.paths.folder, &attached)
        .map_err(|e| CniError::new(code::IO, call.paths.folder.display().to_string(), e))?;
    if ask(&call.paths.folder, Ask::Add(attached), ANSWER).is_ok_and(|answer| answer == Answer::Done) {
        return Ok(result.clone());
    }
    alone(call, &pod.namespace, &host)?;
    Ok(result.clone())
}

/// Without an agent: what it knew last decides, and of what it did not know everything is closed.
fn alone(call: &Call, namespace: &str, host: &Host) -> Result<(), CniError> {
    let standing = Standing::read(&call.paths.standing).unwrap_or_default();
    if standing.touch(namespace) != Touch::Isolated {
        return Ok(());
    }
    sweep(&call.paths.pins);
    tidegate_ebpf::preflight().map_err(|e| CniError::new(code::AGAIN, "this node's kernel", e))?;
    attach_fixed(&call.paths.pins, &standing.fixed(), &host.name, host.ifindex, &call.addresses)
        .map_err(|e: KernelError| CniError::new(code::AGAIN, format!("device {}", host.name), e))
}

fn check(call: &Call, of: &Attachment) -> Result<String, CniError> {
    let Some(noted) = files::noted(&call.paths.folder, of) else {
        return Err(CniError::new(code::MISSING, format!("container {}", of.container), "it is not known"));
    };
    let host = host(call, of)?;
    let standing = Standing::read(&call.paths.standing).unwrap_or_default();
    let (same, closed) =
        (host.is_some_and(|h| h.ifindex == noted.ifindex), standing.touch(&noted.pod.namespace) == Touch::Isolated);
    if !same || (closed && !is_attached(&call.paths.pins, noted.ifindex)) {
        return Err(CniError::new(code::MISSING, format!("device {}", of.ifname), "no program is attached to it"));
    }
    Ok(String::new())
}

/// Removes pins of programs whose devices are gone.
fn sweep(pins: &Path) {
    for ifindex in fixed_devices(pins) {
        let there = nix::net::if_::if_indextoname(ifindex).is_ok_and(|name| !name.is_empty());
        if !there {
            // The next call tries again.
            let _ = detach_fixed(pins, ifindex);
        }
    }
}

/// Asks the agent.
fn ask(folder: &Path, ask: Ask, within: Duration) -> io::Result<Answer> {
    let end = Instant::now() + within;
    let mut stream = UnixStream::connect(files::socket(folder))?;
    stream.set_write_timeout(Some(within))?;
    let mut line = serde_json::to_vec(&Request { version: VERSION, ask })?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left))?;
    let mut answer = Vec::new();
    BufReader::new(stream).take(64 << 10).read_until(b'\n', &mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}
