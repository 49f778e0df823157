//! DNS servers: hickory-server's sockets around [`Table`].

use std::fs::File;
use std::future::Future;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use hickory_proto::op::{Edns, Message, Metadata, ResponseCode};
use hickory_proto::rr::RecordType;
use hickory_server::Server;
use hickory_server::net::runtime::Time;
use hickory_server::net::xfer::Protocol;
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::MessageResponseBuilder;
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::zone::{Answer, Table, Zone};

/// The UDP size that the servers advertise, in octets.
const UDP_PAYLOAD: u16 = 1232;
/// How long a forwarded query may take.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(3);

/// What the servers of one process share.
struct Shared {
    zone: PathBuf,
    forward: Option<SocketAddr>,
    loaded: Mutex<(Option<SystemTime>, Arc<Table>)>,
    log: Mutex<File>,
}

/// One server address.
struct Handler {
    shared: Arc<Shared>,
    server: SocketAddr,
}

/// Starts the servers; they run as long as the returned values live.
pub async fn serve(config: &super::Dns) -> Result<Vec<Server<impl RequestHandler>>> {
    let shared = Arc::new(Shared {
        zone: config.zone.clone(),
        forward: config.forward,
        loaded: Mutex::default(),
        log: Mutex::new(File::options().create(true).append(true).open(&config.log)?),
    });
    shared.table().context("cannot read the zone")?;
    let mut servers = Vec::new();
    for address in &config.addresses {
        let mut server = Server::new(Handler { shared: shared.clone(), server: *address });
        let udp = socket(address, Type::DGRAM).with_context(|| format!("cannot bind UDP {address}"))?;
        server.register_socket(tokio::net::UdpSocket::from_std(udp.into())?);
        let tcp = socket(address, Type::STREAM).with_context(|| format!("cannot bind TCP {address}"))?;
        tcp.listen(1024)?;
        server.register_listener(tokio::net::TcpListener::from_std(tcp.into())?, Duration::from_secs(30), 64);
        servers.push(server);
    }
    Ok(servers)
}

/// A bound socket of one family: `[::]` leaves `0.0.0.0` to another.
fn socket(address: &SocketAddr, kind: Type) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(*address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&(*address).into())?;
    Ok(socket)
}

impl Shared {
    /// The zone, read again if its file changed: whoever replaces the file sees the change in the next answer.
    fn table(&self) -> Result<Arc<Table>> {
        let changed = std::fs::metadata(&self.zone)?.modified()?;
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.0 != Some(changed) {
            let zone: Zone = serde_json::from_str(&std::fs::read_to_string(&self.zone)?)?;
            *loaded = (Some(changed), Arc::new(Table::new(zone)));
        }
        Ok(loaded.1.clone())
    }

    fn record(&self, server: SocketAddr, request: &Request, name: &str, qtype: RecordType) {
        let transport = if request.protocol() == Protocol::Udp { "UDP" } else { "TCP" };
        let client = super::plain(request.src());
        let line = serde_json::json!({
            "server": server.ip(), "client": client.ip(), "name": name.trim_end_matches('.'),
            "type": qtype.to_string(), "transport": transport,
        });
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        // A full disk must not stop the server; the test that misses the line will say so.
        let _ = writeln!(log, "{line}");
    }
}

impl Handler {
    async fn answer(&self, request: &Request) -> Answer {
        let failed = |rcode| Answer { rcode: Some(rcode), ..Answer::default() };
        let Ok(info) = request.request_info() else {
            return failed(ResponseCode::FormErr);
        };
        let (name, qtype) = (info.query.name().to_string(), info.query.query_type());
        self.shared.record(self.server, request, &name, qtype);
        let Ok(table) = self.shared.table() else {
            return failed(ResponseCode::ServFail);
        };
        if table.is_authority(&name) {
            return table.answer(&name, qtype);
        }
        let Some(to) = self.shared.forward else {
            return failed(ResponseCode::Refused);
        };
        match forward(request.as_slice(), request.protocol(), to).await {
            Ok(message) => Answer {
                rcode: Some(message.metadata.response_code),
                answers: message.answers,
                soa: message.authorities,
                ..Answer::default()
            },
            Err(_) => failed(ResponseCode::ServFail),
        }
    }
}

/// Asks another server, UDP first.
async fn forward(query: &[u8], protocol: Protocol, to: SocketAddr) -> Result<Message> {
    let ask = async {
        if protocol == Protocol::Udp {
            let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { [0u8; 16].into() };
            let socket = tokio::net::UdpSocket::bind(SocketAddr::new(any, 0)).await?;
            socket.connect(to).await?;
            socket.send(query).await?;
            let mut buffer = vec![0; 65_535];
            let n = socket.recv(&mut buffer).await?;
            let message = Message::from_vec(&buffer[..n])?;
            if !message.metadata.truncation {
                return Ok(message);
            }
        }
        let mut stream = tokio::net::TcpStream::connect(to).await?;
        stream.write_u16(u16::try_from(query.len())?).await?;
        stream.write_all(query).await?;
        let mut buffer = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut buffer).await?;
        Ok(Message::from_vec(&buffer)?)
    };
    tokio::time::timeout(FORWARD_TIMEOUT, ask).await?
}

/// What `handle_request` must return: the trait is written with `async_trait`.
type Handled<'a> = Pin<Box<dyn Future<Output = ResponseInfo> + Send + 'a>>;

impl RequestHandler for Handler {
    fn handle_request<'a, 'b, 'out, R, T>(&'a self, request: &'b Request, mut responder: R) -> Handled<'out>
    where
        R: ResponseHandler + 'out,
        T: Time + 'out,
        'a: 'out,
        'b: 'out,
        Self: 'out,
    {
        Box::pin(async move {
            let answer = self.answer(request).await;
            if answer.delay_millis > 0 {
                tokio::time::sleep(Duration::from_millis(answer.delay_millis)).await;
            }
            let mut metadata = Metadata::response_from_request(&request.metadata);
            metadata.authoritative = true;
            metadata.recursion_available = true;
            metadata.response_code = answer.rcode.unwrap_or(ResponseCode::ServFail);
            let edns = request.edns.as_ref().map(|asked| {
                let mut edns = Edns::new();
                edns.set_max_payload(asked.max_payload().min(UDP_PAYLOAD));
                edns
            });
            let mut builder = MessageResponseBuilder::from_message_request(request);
            if let Some(edns) = &edns {
                builder.edns(edns);
            }
            let none = Vec::new();
            let response = builder.build(metadata, &answer.answers, &none, &answer.soa, &none);
            if answer.silent {
                return info(&metadata);
            }
            match responder.send_response(response).await {
                Ok(sent) => sent,
                Err(_) => info(&metadata),
            }
        })
    }
}

/// A [`ResponseInfo`] where nothing was sent: it can only be made by encoding.
fn info(metadata: &Metadata) -> ResponseInfo {
    hickory_proto::op::Header { metadata: *metadata, counts: hickory_proto::op::HeaderCounts::default() }.into()
}
